"""How good frozen features are, measured two ways.

`knn` lets the nearest training rows vote and has nothing to train; `linear` fits a multinomial
logistic regression. Both take features that are already extracted, as tensors on one device, and
run there in batches.
"""
