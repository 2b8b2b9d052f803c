"""An exit in one file: a problem leaves once the likeliest symbol of every cell is far enough ahead of the next."""

from looped.inference.exits import Exit


class Margin(Exit):
    """The lead of the likeliest symbol, in probability, in the cell where it is least."""

    default = 0.5

    def settled(self, moment):
        first, second = moment.logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return (first - second).masked_fill(~moment.batch.sought, 1.0).amin(1) > self.threshold
