// Opens pages in chromium and tells, as JSON on stdout, what went wrong and what is in them.
// Arguments: playwright-core's folder, chromium's path, a fresh profile folder, and JSON:
// [{url, width, height, dark, ask: {name: expression}, picture: path or null}, ...]
import { createRequire } from "node:module";

const [driver, executablePath, profile, looks] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(driver);
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const context = await chromium.launchPersistentContext(profile, { executablePath, args, headless: true });
const told = [];
for (const look of JSON.parse(looks)) {
  const page = await context.newPage();
  const trouble = [];
  const requests = [];
  page.on("console", (message) => trouble.push(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => trouble.push(`page error: ${error.message}`));
  page.on("requestfailed", (request) => trouble.push(`request failed: ${request.url().slice(0, 200)}`));
  page.on("response", (response) => response.status() >= 400 && trouble.push(`${response.status()}: ${response.url()}`));
  page.on("request", (request) => request.url().startsWith("data:") || requests.push(request.url()));
  await page.setViewportSize({ width: look.width, height: look.height });
  await page.emulateMedia({ colorScheme: look.dark ? "dark" : "light" });
  await page.goto(look.url, { waitUntil: "load" });
  const answers = {};
  for (const [name, expression] of Object.entries(look.ask)) answers[name] = await page.evaluate(expression);
  if (look.picture) await page.screenshot({ path: look.picture, fullPage: true });
  told.push({ trouble, requests, answers });
  await page.close();
}
await context.close();
console.log(JSON.stringify(told));
