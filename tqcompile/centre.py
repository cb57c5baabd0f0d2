"""A vector for all tokens of a head, turned by each token's place: what is taken off keys before they are encoded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rotation:
    """How keys turn with their position p: channel d of x becomes x_d cos(w_d p) + x_e sin(w_d p), e its partner.

    `frequencies` are the w, in radians a position, with opposite signs in a pair; a channel that does not turn is its
    own partner and has 0.
    """

    frequencies: tuple[float, ...]
    partners: tuple[int, ...]

    def __post_init__(self):
        pairs = list(zip(self.frequencies, self.partners))
        if not pairs or len(self.frequencies) != len(self.partners):
            raise ValueError(
                f"{len(self.frequencies)} frequencies and {len(self.partners)} partners; give one a channel"
            )
        for channel, (frequency, partner) in enumerate(pairs):
            there, back = pairs[partner] if 0 <= partner < len(pairs) else (None, None)
            still = partner == channel and frequency == 0
            if not still and (back != channel or there != -frequency or partner == channel):
                raise ValueError(f"partners={self.partners}: channel {channel} and its partner do not turn together")
