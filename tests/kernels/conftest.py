"""Triton's interpreter is chosen when triton is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
