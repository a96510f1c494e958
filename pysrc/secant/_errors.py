"""Exceptions and warnings of the package."""


class SecantWarning(UserWarning):
    """A choice that costs speed was made for the user, and why."""


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot serve the call."""


class SingularWarning(UserWarning):
    """A problem has many solutions, of which one came back."""
