"""What a user can mend: one base for the errors whose message is the whole story (see cli/verbs.py)."""


class UserError(Exception):
    """Bad input, named by file, row or key, with its remedy. A verb prints the message and ends with status 1."""
