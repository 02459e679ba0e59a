# As printed in the document of the unified gateway.
curl http://localhost:8000/v1/generate -X POST \
  -H "Content-Type: application/json" \
  -d '{
    "model_id": "llama3",
    "inputs": "牛顿三大定律是什么？",
    "scenario": "qa",
    "parameters": {
      "max_new_tokens": 200,
      "temperature": 0.5
    }
  }'
