# Free scalars, held in [0, 1] when used. Figure 8a; the loop is in gate.py.
shift_weights = "clamp"
