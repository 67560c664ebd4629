# The two scalars as sigmoid(a) and 1 - sigmoid(a). Figure 8a: for v in vanilla kv gate clamp, the loop in vanilla.py.
shift_weights = "gate"
