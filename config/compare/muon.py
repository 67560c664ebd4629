# Muon for the matrices of the blocks. Not in the paper; a third file, as in
#   for v in vanilla kv; do for s in 1 2 3; do python train.py config/compare/shakespeare.py config/compare/$v.py \
#     config/compare/muon.py --seed=$s --out_dir=out/compare/shakespeare-muon-$v-$s; done; done
#   python plot.py out/compare/shakespeare-muon-{vanilla,kv}-*
optimizer = "muon"
