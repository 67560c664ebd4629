# Free scalars, held in [0, 1] when used. Figure 8a, with gate.py.
shift_weights = "clamp"
