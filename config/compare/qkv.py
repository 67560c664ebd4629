# Queries are shifted, too; in the paper with a like loss and worse benchmarks. The loop is in vanilla.py.
kv_shift = "qkv"
