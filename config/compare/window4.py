# Keys and values of four tokens are mixed. Figure 8c; the loop is in window3.py.
shift_window = 4
