"""The one error that a bad file of a data set ends in."""


class UnreadableClipError(ValueError):
    """A file that holds no whole clip: empty, truncated, or not a picture, an animation or a video that can be read.

    What stands before the first colon of its message is the kind of fault, by which reports count.
    """
