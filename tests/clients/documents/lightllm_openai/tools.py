# As printed in the document of LightLLM, its OpenAI API.
import requests
import json

url = "http://localhost:8088/v1/chat/completions"
headers = {"Content-Type": "application/json"}

# 定义函数
tools = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "获取指定城市的当前天气信息",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {
                        "type": "string",
                        "description": "城市名称，例如：北京、上海"
                    },
                    "unit": {
                        "type": "string",
                        "enum": ["celsius", "fahrenheit"],
                        "description": "温度单位"
                    }
                },
                "required": ["city"]
            }
        }
    }
]

# 请求数据
data = {
    "model": "your_model_name",
    "messages": [
        {"role": "user", "content": "北京今天天气怎么样？"}
    ],
    "tools": tools,
    "tool_choice": "auto",  # 让模型自动决定是否调用函数
    "temperature": 0.7,
    "max_tokens": 1000
}

# 发送请求
response = requests.post(url, headers=headers, json=data)

if response.status_code == 200:
    result = response.json()
    message = result["choices"][0]["message"]

    # 检查是否有函数调用
    if message.get("tool_calls"):
        print("模型决定调用函数:")
        for tool_call in message["tool_calls"]:
            print(f"函数名: {tool_call['function']['name']}")
            print(f"参数: {tool_call['function']['arguments']}")
    else:
        print("回复:", message["content"])
else:
    print("错误:", response.status_code, response.text)
