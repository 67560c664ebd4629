# Only keys are shifted. Figure 8b: for v in vanilla kv k_only v_only, the loop in vanilla.py.
kv_shift = "k"
