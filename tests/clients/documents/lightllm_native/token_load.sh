# As printed in the document of LightLLM, its native API.
curl http://0.0.0.0:8080/token_load
