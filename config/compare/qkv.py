# Queries are shifted, too; in the paper with a like loss and worse benchmarks. With the two that it does not have:
#   for v in kv qkv per_channel smeared; do for s in 1 2 3 4 5; do python train.py config/compare/shakespeare.py \
#     config/compare/$v.py --seed=$s --out_dir=out/compare/shakespeare-$v-$s; done; done
#   python plot.py out/compare/shakespeare-{kv,qkv,per_channel,smeared}-*
kv_shift = "qkv"
