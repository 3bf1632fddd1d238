"""The error for what a user can mend."""


class UserError(ValueError):
    """Bad input, in one sentence that says what was given, what is allowed and what to do.

    The command line prints the sentence and exits with status 2; any other exception is a bug and shows its traceback.

    Args:
        key: dotted name of the fault, such as `config.exit_layers.order`. It stays the same when the sentence is
            improved, so that programs and tests can rely on it.
        message: the sentence.

    Example:
        >>> raise UserError("exit_layer.unknown", "exit_layer 3 is not trained. Available: 1, 2, 4.")
        Traceback (most recent call last):
            ...
        modular_star_encoder.utils.errors.UserError: exit_layer 3 is not trained. Available: 1, 2, 4.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        return type(self), (self.key, str(self))
