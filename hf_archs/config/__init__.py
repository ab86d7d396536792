"""Configs of models: the fields that all share, models of several kinds of layers, and patterns of layers."""
