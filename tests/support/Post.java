// Requests by the JDK's HttpClient as it is, which offers h2c: java Post.java URL FILE length|chunked|expect
import java.io.*;
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;
import java.time.Duration;

public class Post {
  public static void main(String[] given) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    byte[] body = Files.readAllBytes(Path.of(given[1]));
    for (int i = 0; i < 3; i++) {
      HttpRequest.BodyPublisher publisher = given[2].equals("chunked")
          ? HttpRequest.BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body))
          : HttpRequest.BodyPublishers.ofByteArray(body);
      HttpRequest request = HttpRequest.newBuilder(URI.create(given[0]))
          .timeout(Duration.ofSeconds(60))
          .header("Content-Type", "application/json")
          .expectContinue(given[2].equals("expect"))
          .POST(publisher)
          .build();
      HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(answer.version() + " " + answer.statusCode() + " " + answer.body());
    }
  }
}
