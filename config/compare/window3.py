# Keys and values of three tokens are mixed. Figure 8c: for v in vanilla kv window3 window4, the loop in vanilla.py.
shift_window = 3
