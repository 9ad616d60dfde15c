"""visrl: teach a vision-language model where to look."""

__version__ = "0.1.0"
