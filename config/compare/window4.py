# Keys and values of four tokens are mixed. Figure 8c, with window3.py.
shift_window = 4
