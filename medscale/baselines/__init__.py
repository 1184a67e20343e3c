"""What croppable training is compared with: crops of directly trained models, distilled models, compact encoders."""
