# As printed in the document of the unified gateway.
curl http://localhost:8000/v1/generate -X POST \
  -H "Content-Type: application/json" \
  -d '{
    "model_id": "llama3",
    "inputs": "这个产品非常好，大家都很喜欢。",
    "scenario": "rewrite",
    "parameters": {
      "max_new_tokens": 64,
      "temperature": 0.9
    }
  }'
