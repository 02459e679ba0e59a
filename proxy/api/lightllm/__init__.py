"""LightLLM's native endpoints, and those whose bodies hold raw prompts as its do: TGI, SGLang, LMDeploy today."""
