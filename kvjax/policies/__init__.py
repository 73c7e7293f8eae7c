"""The methods, one file each."""

from kvjax.policies.attention_gate import attention_gate
from kvjax.policies.cam import cam
from kvjax.policies.compactor import compactor
from kvjax.policies.d2o import d2o
from kvjax.policies.elastic_cache import elastic_cache
from kvjax.policies.ems import ems
from kvjax.policies.expected_attention import expected_attention
from kvjax.policies.full import full
from kvjax.policies.h2o import h2o
from kvjax.policies.keydiff import keydiff
from kvjax.policies.kivi import kivi
from kvjax.policies.kvmerger import kvmerger
from kvjax.policies.locret import locret
from kvjax.policies.mikv import mikv
from kvjax.policies.random import random
from kvjax.policies.snapkv import snapkv
from kvjax.policies.streaming_llm import streaming_llm
from kvjax.policies.think import think
from kvjax.policies.tova import tova

__all__ = [
    "attention_gate",
    "cam",
    "compactor",
    "d2o",
    "elastic_cache",
    "ems",
    "expected_attention",
    "full",
    "h2o",
    "keydiff",
    "kivi",
    "kvmerger",
    "locret",
    "mikv",
    "random",
    "snapkv",
    "streaming_llm",
    "think",
    "tova",
]
