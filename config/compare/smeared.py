# Smeared keys (arXiv 2209.11895): only keys are shifted, by sigmoid(a) and 1 - sigmoid(a). Not in the paper. The loop is in
# vanilla.py.
kv_shift = "k"
shift_weights = "gate"
