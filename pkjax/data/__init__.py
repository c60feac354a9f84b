"""Labelled images as arrays: scikit-learn's digits, MNIST and CIFAR through TFDS without TensorFlow, Tiny ImageNet."""

from pkjax.data.dataset import Dataset, load, names

__all__ = ["Dataset", "load", "names"]
