# Only values are shifted. Figure 8b, with k_only.py.
kv_shift = "v"
