# As printed in the document of LightLLM, its native API.
curl http://localhost:8080/generate \
-H "Content-Type: application/json" \
-d '{
     "inputs": "What is AI?",
     "parameters":{
       "max_new_tokens":17,
       "frequency_penalty":1
     },
     "multimodal_params":{}
    }'
