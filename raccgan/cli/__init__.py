"""What the commands share: their options, and one clear line for every error."""
