"""Token ids to text, as they come, up to a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes one output token by token; a text that might begin a stop string is held back until it is clear.

    Stop strings count only after `min_tokens` tokens. `stopped` tells that one was met; its text is not part of the
    output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str] = (), min_tokens: int = 0):
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that may be sent now."""
        self._tokens += 1
        piece = self._decoder.step(self._tokenizer, token_id) or ""
        if not self._stops or self._tokens <= self._min_tokens:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, when the output has ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
