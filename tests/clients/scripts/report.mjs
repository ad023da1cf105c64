// The requests that every library for Node.js makes, and the report that the test reads.
// Started as `node NAME.mjs BASE_URL MODEL MODEL`; neither model is loaded. See report.py.

export const [BASE_URL, FIRST, SECOND] = process.argv.slice(2);
export const QUESTION = 'Who are you?';
export const WEATHER_QUESTION = 'What is the weather in Paris?';
export const WEATHER = {
  name: 'get_weather',
  description: 'The weather in a city',
  parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
};

export async function report({ stream, plain, toolStream, toolPlain, ...others }) {
  const results = {};
  const record = async (name, call, model) => {
    try {
      results[name] = await call(model);
    } catch (error) {
      results[name] = { error: String(error?.stack ?? error) };
    }
  };
  await record('cold_stream', stream, FIRST);
  await record('cold_plain', plain, SECOND);
  await record('warm_stream', stream, FIRST);
  await record('warm_plain', plain, SECOND);
  await record('tool_stream', toolStream, FIRST);
  await record('tool_plain', toolPlain, FIRST);
  for (const [name, call] of Object.entries(others)) await record(name, call, FIRST);
  console.log(JSON.stringify(results));
}
