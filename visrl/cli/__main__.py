"""`python -m visrl.cli` is the program `visrl`, for launchers that start a module."""

from visrl.cli import main

main()
