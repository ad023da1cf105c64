// The anthropic library: messages, models. CLIENT_PACKAGE names the version.

import { BASE_URL, QUESTION, WEATHER, WEATHER_QUESTION, report } from './report.mjs';

const { default: Anthropic } = await import(process.env.CLIENT_PACKAGE);
const client = new Anthropic({ baseURL: BASE_URL, apiKey: 'unused', maxRetries: 0 });
const asked = (model, content) => ({ model, max_tokens: 512, messages: [{ role: 'user', content }] });
const tools = [{ name: WEATHER.name, description: WEATHER.description, input_schema: WEATHER.parameters }];

function called(message) {
  const block = message.content.find((each) => each.type === 'tool_use');
  return [block.name, block.input];
}

await report({
  async stream(model) {
    const pieces = [];
    const stream = client.messages.stream(asked(model, QUESTION));
    stream.on('text', (text) => pieces.push(text));
    await stream.finalMessage();
    return pieces;
  },
  async plain(model) {
    return (await client.messages.create(asked(model, QUESTION))).content[0].text;
  },
  async toolStream(model) {
    return called(await client.messages.stream({ ...asked(model, WEATHER_QUESTION), tools }).finalMessage());
  },
  async toolPlain(model) {
    return called(await client.messages.create({ ...asked(model, WEATHER_QUESTION), tools }));
  },
  async models(model) {
    const found = [];
    for await (const entry of await client.models.list({ limit: 100 })) if (entry.id === model) found.push(entry.id);
    return found;
  },
});
