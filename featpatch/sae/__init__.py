"""Dictionaries of features: SAEs, transcoders and other objects with an encoder and a decoder, at hook points of a model."""
