# As printed in the document of the unified gateway.
curl http://localhost:8000/v1/generate -X POST \
  -H "Content-Type: application/json" \
  -d '{
    "model_id": "qwen2",
    "inputs": "人工智能是计算机科学的一个分支，旨在创建能够执行通常需要人类智能的任务的系统……",
    "scenario": "summarize",
    "parameters": {
      "max_new_tokens": 100
    }
  }'
