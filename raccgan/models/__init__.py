"""The networks, what they compute at inference, and the file that keeps them."""
