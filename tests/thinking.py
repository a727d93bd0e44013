"""A message and a template that can think, for the tests of templates and of thinking."""

from __future__ import annotations

from conftest import CHATML

USER = [{"role": "user", "content": "Hello"}]
# As Qwen3's: an empty thought stands there if thinking is off.
SWITCHED = CHATML + (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
ASSISTANT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
