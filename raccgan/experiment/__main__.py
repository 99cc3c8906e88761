import sys

from raccgan.cli import options
from raccgan.experiment.command import main

if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
