# As printed in the document of the unified gateway.
curl http://localhost:8000/v1/generate -X POST \
  -H "Content-Type: application/json" \
  -d '{
    "model_id": "qwen2",
    "inputs": "请用中文介绍你自己",
    "parameters": {
      "max_new_tokens": 128,
      "temperature": 0.7,
      "top_p": 0.9
    }
  }'
