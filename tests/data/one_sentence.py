"""What bad data ends in."""

import pytest

from looped.errors import UserError


def sentence_of(action):
    """The message of the one UserError that `action` raises."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message
