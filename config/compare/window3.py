# Keys and values of three tokens are mixed. Figure 8c, with window4:
#   for v in kv window3 window4; do for s in 1 2 3 4 5; do python train.py config/compare/shakespeare.py \
#     config/compare/$v.py --seed=$s --out_dir=out/compare/shakespeare-$v-$s; done; done
#   python plot.py out/compare/shakespeare-{kv,window3,window4}-*
shift_window = 3
