# The two scalars as sigmoid(a) and 1 - sigmoid(a). Figure 8a, with clamp:
#   for v in kv gate clamp; do for s in 1 2 3 4 5; do python train.py config/compare/shakespeare.py config/compare/$v.py \
#     --seed=$s --out_dir=out/compare/shakespeare-$v-$s; done; done
#   python plot.py out/compare/shakespeare-{kv,gate,clamp}-*
shift_weights = "gate"
