# As printed in the document of LightLLM, its OpenAI API.
import requests
import json

# 配置
url = "http://localhost:8088/v1/chat/completions"
headers = {"Content-Type": "application/json"}

# 请求数据
data = {
    "model": "your_model_name",
    "messages": [
        {"role": "user", "content": "你好，请介绍一下你自己"}
    ],
    "temperature": 0.7,
    "max_tokens": 1000
}

# 发送请求
response = requests.post(url, headers=headers, json=data)

if response.status_code == 200:
    result = response.json()
    print("回复:", result["choices"][0]["message"]["content"])
else:
    print("错误:", response.status_code, response.text)
