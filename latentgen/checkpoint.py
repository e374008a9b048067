"""Checkpoints: folders in the diffusers layout, their shards and variants, and the Hub; safetensors only."""

from __future__ import annotations

from latentgen.files import write_json as write_json
from latentgen.headers import read_header as read_header
from latentgen.weights import load_weights as load_weights
from latentgen.weights import save_weights as save_weights
