"""Why results differ, where that is so of several cases."""

from __future__ import annotations

SINKS = (
    "the paper's attention is a softmax over all keys (section 3); kvpress leaves the sinks out of its denominator, "
    "which shifts the weights of the heads of a group against each other"
)
NO_HEAD_DIM = "kvpress reads config.head_dim, which this model's configuration does not have (table, section 1)"
SAFEGUARD = (
    "algorithm 1 of CriticalKV chooses all pairs of a head in two stages, whatever its budget; kvpress keeps the pairs "
    "of AdaKV's safeguard before them"
)
SEED = "with a seed kvpress draws the same numbers in every layer"
SUMS = "norms are divided by the window's sum instead of its mean, so that a shorter last window gets too much"
PADDING = "padding is masked with -1e-9 instead of -inf, and padded queries add uniform attention"
SKETCH = (
    "kvpress's sketch is drawn anew at every call, and its scores, solved for in float32, are off in the third digit"
)
Z_SCORES = "one z-score over all heads and rows instead of one for each head; the sketch and the padding as above"
OF_THE_LAST_CHUNK = (
    "every chunk is scored at the positions of the last one; and coldpress gives each chunk a share of its "
    "unprotected tokens"
)
IN_ORDER_OF_SCORES = (
    "pairs are gathered in the order of scores, so that the second press protects a window of other tokens; "
    "and coldpress lets every press score the whole text"
)
FIRST_LAYER = (
    "kvpress makes the first layer the largest, by the best scores of any layer, because its length makes the "
    "mask of all"
)
PRUNED_WINDOW = "section 3.2 of ThinK leaves the keys of the observation window whole; kvpress prunes them too"
ONE_LESS = "kvpress weighs a query by the number of tokens before it, one less than it sees"
WHOLE_CHUNKS = (
    "kvpress keeps whole chunks, other numbers than the ratio asks for; coldpress keeps the first tokens of "
    "one more chunk, and protected tokens do not count in the mean of their chunk"
)
MEDIANS = "protected tokens make the medians that chunks are held against; in coldpress they do not count"
DRAWS = (
    "whether a pair is merged is drawn from the global generator, in coldpress from the cache's seed; the kept "
    "pairs are the same"
)
WHOLE_PAIRS = (
    "in coldpress layers keep a whole number of pairs on average, and are rounded so that this is met; kvpress rounds "
    "each layer by itself, and its mean not at all"
)
OF_ALL_HEADS = (
    "in coldpress heads keep a whole number of pairs on average; kvpress rounds the number of all pairs of the model"
)
