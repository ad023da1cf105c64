// The openai library: chat, responses, models. CLIENT_PACKAGE names the version.

import { BASE_URL, QUESTION, WEATHER, WEATHER_QUESTION, report } from './report.mjs';

const { default: OpenAI } = await import(process.env.CLIENT_PACKAGE);
const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: 'unused', maxRetries: 0 });
const asked = (model, content) => ({ model, messages: [{ role: 'user', content }] });
const tools = [{ type: 'function', function: WEATHER }];

await report({
  async stream(model) {
    const pieces = [];
    for await (const chunk of await client.chat.completions.create({ ...asked(model, QUESTION), stream: true })) {
      const text = chunk.choices[0]?.delta?.content;
      if (text) pieces.push(text);
    }
    return pieces;
  },
  async plain(model) {
    return (await client.chat.completions.create(asked(model, QUESTION))).choices[0].message.content;
  },
  async toolStream(model) {
    let [name, text] = ['', ''];
    const body = { ...asked(model, WEATHER_QUESTION), tools, stream: true };
    for await (const chunk of await client.chat.completions.create(body)) {
      for (const call of chunk.choices[0]?.delta?.tool_calls ?? []) {
        name += call.function.name ?? '';
        text += call.function.arguments ?? '';
      }
    }
    return [name, JSON.parse(text)];
  },
  async toolPlain(model) {
    const answer = await client.chat.completions.create({ ...asked(model, WEATHER_QUESTION), tools });
    const call = answer.choices[0].message.tool_calls[0].function;
    return [call.name, JSON.parse(call.arguments)];
  },
  async responses_stream(model) {
    const pieces = [];
    for await (const event of await client.responses.create({ model, input: QUESTION, stream: true })) {
      if (event.type === 'response.output_text.delta') pieces.push(event.delta);
    }
    return pieces;
  },
  async responses_plain(model) {
    return (await client.responses.create({ model, input: QUESTION })).output_text;
  },
  async models(model) {
    const found = [];
    for await (const entry of await client.models.list()) if (entry.id === model) found.push(entry.id);
    return found;
  },
});
