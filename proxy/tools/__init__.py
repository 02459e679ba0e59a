"""Tool calls: what models write for them, what clients are told, how they enter prompts and grammars.

families.py   which texts a model writes (qwen25, llama3, mistral), recognised from its chat template
parsers.py    an answer's text in pieces → content and calls in pieces, on json_scan.py
reader.py     one sample's content and calls, as they grow
use.py        what a request says about tools, as `ToolUse`, which proxy/api/openai/tools.py makes of its fields
grammar.py    calls that are enforced → a grammar in the family's own format
prompt.py     tools and earlier calls in prompts of models whose chat template has no place for them
"""
