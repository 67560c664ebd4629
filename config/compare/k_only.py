# Only keys are shifted. Figure 8b, with v_only:
#   for v in vanilla kv k_only v_only; do for s in 1 2 3 4 5; do python train.py config/compare/shakespeare.py \
#     config/compare/$v.py --seed=$s --out_dir=out/compare/shakespeare-$v-$s; done; done
#   python plot.py out/compare/shakespeare-{kv,vanilla,k_only,v_only}-*
kv_shift = "k"
