# As printed in the document of the EPD service.
curl -X POST http://127.0.0.1:5580/v1/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "/workspace/models/Qwen2.5-VL-7B-Instruct",
    "prompt": "Once upon a time, there was a wise assistant who",
    "max_tokens": 128,
    "temperature": 0.7,
    "stream": false
  }'
