# As printed in the document of LightLLM, its OpenAI API.
import requests
import json

url = "http://localhost:8088/v1/chat/completions"
headers = {"Content-Type": "application/json"}

tools = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "执行数学计算",
            "parameters": {
                "type": "object",
                "properties": {
                    "expression": {"type": "string", "description": "数学表达式"}
                },
                "required": ["expression"]
            }
        }
    }
]

data = {
    "model": "your_model_name",
    "messages": [
        {"role": "user", "content": "请计算 25 * 4 + 10 的结果"}
    ],
    "tools": tools,
    "tool_choice": "auto",
    "stream": True,
    "temperature": 0.7,
    "max_tokens": 1000
}

response = requests.post(url, headers=headers, json=data, stream=True)

if response.status_code == 200:
    content_buffer = ""
    tool_calls_buffer = []

    for line in response.iter_lines():
        if line:
            line = line.decode('utf-8')
            if line.startswith('data: '):
                data_str = line[6:]
                if data_str == '[DONE]':
                    break
                try:
                    chunk = json.loads(data_str)
                    delta = chunk['choices'][0]['delta']

                    # 处理内容
                    if delta.get('content'):
                        content_buffer += delta['content']
                        print(delta['content'], end='', flush=True)

                    # 处理函数调用
                    if delta.get('tool_calls'):
                        for tool_call in delta['tool_calls']:
                            tool_calls_buffer.append(tool_call)
                            print(f"\n[函数调用: {tool_call['function']['name']}]")
                            if tool_call['function'].get('arguments'):
                                print(f"参数: {tool_call['function']['arguments']}")

                except json.JSONDecodeError:
                    continue
else:
    print("错误:", response.status_code, response.text)
