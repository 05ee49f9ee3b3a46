"""The text that the example learns: the English reference manual that every CPython carries."""

from pydoc_data.topics import topics

import numpy as np

VALIDATION_SHARE = 0.1


def load() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on and the bytes to validate on, uint8 [n] each.

    The topics quote each other's paragraphs. Each paragraph is kept once, so that nothing of the
    validation text can be learned by heart.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = dict.fromkeys(text.split("\n\n"))
    data = np.frombuffer("\n\n".join(paragraphs).encode(), np.uint8)
    cut = round(data.size * (1 - VALIDATION_SHARE))
    return data[:cut], data[cut:]


def unigram_entropy(data: np.ndarray) -> float:
    """The entropy of single bytes, in nats: no model without context has a smaller loss.

    Args:
        data: uint8 [n].
    """
    share = np.bincount(data) / data.size
    share = share[share > 0]
    return float(-np.sum(share * np.log(share)))


def training_batch(data: np.ndarray, step: int, batch: int, length: int, seed: int) -> np.ndarray:
    """Random windows, a function of seed and step alone, so that a resumed run sees the same ones.

    Args:
        data: uint8 [n].
        step: Counts the batches.
        batch: Windows per batch.
        length: Bytes per window.
        seed: Of the whole run.

    Returns:
        int32 [batch, length].
    """
    starts = np.random.default_rng((seed, step)).integers(0, data.size - length, batch)
    return data[starts[:, None] + np.arange(length)].astype(np.int32)


def validation_windows(
    data: np.ndarray, batch: int, length: int, batches: int = 6
) -> list[np.ndarray]:
    """Windows spread evenly over the text.

    Args:
        data: uint8 [n].
        batch: Windows per batch.
        length: Bytes per window.
        batches: Number of batches.

    Returns:
        The batches, int32 [batch, length] each.
    """
    starts = np.linspace(0, data.size - length, batches * batch, dtype=np.int64)
    windows = data[starts[:, None] + np.arange(length)].astype(np.int32)
    return list(windows.reshape(batches, batch, length))
